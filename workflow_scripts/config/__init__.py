"""What the user wrote, checked and resolved."""
