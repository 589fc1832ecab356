#!/bin/sh
# nvcc and CUDA's static runtime, into a container of manylinux_2_28 (AlmaLinux 8, x86-64): for cibuildwheel.
set -eu
version=13-0
dnf -q -y install dnf-plugins-core
dnf config-manager --add-repo https://developer.download.nvidia.com/compute/cuda/repos/rhel8/x86_64/cuda-rhel8.repo
dnf -q -y install "cuda-nvcc-$version" "cuda-cudart-devel-$version"
/usr/local/cuda/bin/nvcc --version
