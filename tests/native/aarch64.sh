#!/bin/sh
# Builds the library and its kernel test for aarch64 and runs the test in an emulator, on any machine:
#
#   tests/native/aarch64.sh [BUILD_FOLDER]
#
# On Debian and Ubuntu it needs: cmake ninja-build g++-aarch64-linux-gnu qemu-user
set -eu

source=$(cd "$(dirname "$0")/../.." && pwd)
build=${1:-$source/build/aarch64}

cmake -S "$source" -B "$build" -G Ninja \
  -DCMAKE_SYSTEM_NAME=Linux \
  -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
  -DCMAKE_BUILD_TYPE=Release \
  -DSWAFAST_KERNEL_TEST=ON
cmake --build "$build"
# The cross compiler's own C library stands in for the machine's.
qemu-aarch64 -L /usr/aarch64-linux-gnu "$build/kernel_test"
