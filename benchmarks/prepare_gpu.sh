#!/bin/sh
# What a GPU machine without network needs for the benchmarks, made into .peers (ignored, never committed):
#   peers.tar.xz  the peers' packages, unpacked (CPython 3.12, x86-64, beside torch 2.11 for CUDA 13, transformers 5.17,
#                 peft and accelerate, which the machine has)
#   ours.tar.xz   packages that tenon needs and such a machine may lack
#   banking77.npz, tokenizer/, base/0, base/1   rows, a tokenizer, and SmolLM2-135M's GGUF in two pieces
# Usage, from the repository: benchmarks/prepare_gpu.sh DATA   (DATA: folder with banking77's train.csv and test.csv)
# Then carry .peers, without base/ or with one piece of it at a time, and see benchmarks/gpu.sh.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
data=${1:?folder with train.csv and test.csv}
python="$root/.venv/bin/python"
out="$root/.peers"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

PEERS='unsloth==2026.10.9 unsloth_zoo==2026.10.9 trl==1.15.0 liger-kernel==0.8.5 bitsandbytes==0.50.2
  cut-cross-entropy==25.1.1 datasets==4.8.5 diffusers==0.42.1 hf_transfer==0.1.9 tyro==1.0.17 docstring_parser==0.18.0
  typeguard==4.6.0 json5==0.17.3 nest_asyncio==1.6.0 structlog==26.1.0 msgspec==0.22.0 multiprocess==0.70.19 dill==0.4.1
  torchao==0.18.0 pydantic==2.14.3 pydantic_core==2.50.4 annotated_types==0.8.0 typing_inspection==0.4.5'
OURS='pydantic==2.14.4 pydantic_core==2.50.5 annotated_types==0.8.0 typing_inspection==0.4.5 typing_extensions==4.16.0
  orjson==3.13.0 gguf==0.19.0 nvidia-cudnn-frontend==1.18.0'

# fetch NAME REQUIREMENT…: wheels for the GPU machine's Python, unpacked into one folder.
fetch() {
  name=$1
  shift
  platforms=
  for version in 2_28 2_27 2_24 2_17 2014 1; do
    case $version in *_*) tag=manylinux_${version}_x86_64 ;; *) tag=manylinux${version}_x86_64 ;; esac
    platforms="$platforms --platform $tag"
  done
  # shellcheck disable=SC2086
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp $platforms \
    -d "$scratch/$name.wheels" "$@"
  mkdir -p "$scratch/$name"
  for wheel in "$scratch/$name.wheels"/*.whl; do
    "$python" -m zipfile -e "$wheel" "$scratch/$name"
  done
}

mkdir -p "$out"
# shellcheck disable=SC2086
fetch peers $PEERS
# shellcheck disable=SC2086
fetch ours $OURS
# Not part of a step: a web interface, tests, kernels for other versions of CUDA and for other accelerators.
rm -rf "$scratch/peers/studio" "$scratch/peers/test" "$scratch/peers/unsloth_cli"
find "$scratch/peers/bitsandbytes" -name 'libbitsandbytes_*.so' ! -name '*cuda130.so' ! -name '*cpu.so' -delete
for name in peers ours; do
  tar -C "$scratch/$name" -cf - . | xz -T0 -6 > "$out/$name.tar.xz"
done
(cd "$root" && "$python" -m benchmarks.gpu.prepare --data "$data" --out "$out")
du -ah "$out" | sort -h
