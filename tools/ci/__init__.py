"""What the workflows in ``.github/workflows`` run, and what can be run without them."""
