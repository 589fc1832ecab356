// In place of CUDA's: device_code.h defines what csrc uses of it.
#pragma once
