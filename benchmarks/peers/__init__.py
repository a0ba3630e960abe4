"""The contestants' libraries, a file each; none is imported before its contestant is built."""
