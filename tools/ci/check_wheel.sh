#!/usr/bin/env bash
# Install a wheel in an empty virtual environment and use it from a folder without the checkout:
#     tools/ci/check_wheel.sh WHEEL [PYTHON]
set -euo pipefail
wheel=$(realpath "$1")
python=${2:-python3}
folder=$(cd "$(mktemp -d)" && pwd -P)
trap 'rm -rf "$folder"' EXIT

"$python" -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet "${wheel}[cpu,mpi]"
cd "$folder"
export PATH="$folder/venv/bin:$PATH"

ringattn verify | tee verify.txt
grep -q 'softmax of the CPU kernel: compiled' verify.txt
python -c 'from ringattn.native import load, sgemm; assert load(sgemm.LIBRARY, sgemm.FUNCTIONS)'

ringattn samples quickstart.py > example.py
ringattn launch -n 2 -- example.py
ringattn launch -n 2 --prefix -- python -c 'import ringattn; print(ringattn.__file__)' | tee where.txt
test "$(grep -c " $folder/venv/" where.txt)" = 2
