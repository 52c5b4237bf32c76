"""The network: torch only, no tokenizer, file, process group, logger or optimizer."""
