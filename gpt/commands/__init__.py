"""The larger commands, a file each: ``(words, prog)`` to an exit status."""
