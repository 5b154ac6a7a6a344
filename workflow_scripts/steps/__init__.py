"""The phases: a command each, and what only commands share."""
