#!/usr/bin/env bash
# One step of the macOS workflow. It writes its results to reports/ too. On Linux it uses the host runtime.
#     tools/ci/macos.sh install|device|verify|tests|ring
set -euo pipefail
cd "$(dirname "$0")/../.."
mkdir -p reports
export PATH="$PWD/.venv/bin:$PATH"

install() {
    "${PYTHON:-python3}" -m venv .venv
    python -m pip install --quiet -e ".[cpu,mpi,lm,test]" # cpu: nothing on a Mac
}

# On a Mac the GPU must be MLX's default device. The steps below skip the Metal features that it lacks.
device() {
    if [ "$(uname)" = Darwin ]; then
        python -m tools.ci.metal_canary --require-gpu reports/device.json
    else
        python -m tools.ci.metal_canary reports/device.json
    fi
}

# Without such a feature kernels fail their check, and the report shows it.
verify() {
    ringattn verify 2>&1 | tee reports/verify.txt || lacks_features
}

lacks_features() {
    python -c '
import json, sys
found = json.load(open("reports/device.json"))
sys.exit(0 if found["metal"] and found["missing"] else 1)'
}

tests() {
    python -m pytest tests -k metal -rs --junitxml reports/metal-tests.xml | tee reports/metal-tests.txt
}

ring() {
    ringattn launch -n 2 -- examples/quickstart.py 2>&1 | tee reports/quickstart.txt
}

case "${1:-}" in
    install | device | verify | tests | ring) "$1" ;;
    *) echo "Error: STEP: '${1:-}', expected install, device, verify, tests or ring" >&2; exit 2 ;;
esac
