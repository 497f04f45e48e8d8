"""A module that starts a thread when it is imported, as numpy does where its BLAS has several."""

import threading

threading.Thread(target=threading.Event().wait, daemon=True).start()
