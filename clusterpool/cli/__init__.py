"""The command `clusterpool`: start, look at, use and end clusters."""
