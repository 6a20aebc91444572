"""What the commands share: options, help pages, signals."""
