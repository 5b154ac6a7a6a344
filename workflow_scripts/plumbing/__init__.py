"""Messages, progress, signals, files, locks of GPUs: nothing here decides a number."""
