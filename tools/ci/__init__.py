"""Scripts that the workflows in ``.github/workflows`` run. They also run without a workflow."""
