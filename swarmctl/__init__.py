"""The command line: it parses, asks the daemon over HTTP, and prints."""
