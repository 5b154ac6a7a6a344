"""For people: what would rerun and why, what is there, what fits, what differs."""
