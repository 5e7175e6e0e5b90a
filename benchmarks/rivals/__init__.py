"""ringattn beside what people use instead, measured in one run.

    python -m benchmarks.rivals operator      # attention: PyTorch, ring-attention-pytorch, axolotl-ringmaster, MLX
    sudo python -m benchmarks.rivals job      # a whole language model on virtual hosts: mlx-lm in three ways
    python -m benchmarks.rivals page          # the tables and the picture of docs/benchmarks.md, from the results

Each rival is installed from PyPI into a virtual environment of its own. Answers are compared before anything is timed.
A rival that cannot do the work is a row that says why. Results are JSON files in `benchmarks/rivals/results`.
"""
