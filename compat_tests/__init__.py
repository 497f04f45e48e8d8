"""Other people's tests, run where they are installed, against clusterpool or any other module of the same names."""
