#!/bin/sh
# Builds what bench/quantizer_peers.py compares with; it does without what is missing. For the CPU only.
#
#     bench/quantizer_peers.sh [FOLDER]       # by default build/quantizer-peers
#
# FOLDER/llmcompressor  llm-compressor, with the compressed-tensors and transformers that it asks for
# FOLDER/gptqmodel      GPTQModel. It asks for torch 2.14.1; GPTQ on a CPU runs with 2.13.0, too.
# FOLDER/autoround      auto-round, which wants a later huggingface_hub than llm-compressor
#
# What is there already is left as it is. 1.5 GB each.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-$here/../build/quantizer-peers}"
cd "${1:-$here/../build/quantizer-peers}"

make_environment() { # NAME: with a CPU build of torch, which others must find in place
    rm -rf "$1"
    python3 -m venv "$1"
    "$1/bin/python" "$here/../scripts/install_torch.py"
}

if [ ! -d llmcompressor ]; then
    make_environment llmcompressor.partial
    llmcompressor.partial/bin/python -m pip install torch==2.13.0 llmcompressor==0.14.0.1
    mv llmcompressor.partial llmcompressor
fi

if [ ! -d gptqmodel ]; then
    make_environment gptqmodel.partial
    gptqmodel.partial/bin/python -m pip install --no-deps -r "$here/quantizer_peers.txt"
    mv gptqmodel.partial gptqmodel
fi

if [ ! -d autoround ]; then
    make_environment autoround.partial
    autoround.partial/bin/python -m pip install torch==2.13.0 auto-round==0.16.1
    mv autoround.partial autoround
fi
