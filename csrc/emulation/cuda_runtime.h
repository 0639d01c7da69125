// Stands in for the toolkit's header of this name: the folder comes first on the include path of emulated builds.
#pragma once

#include "cuda_host.hpp"
#include "cuda_streams.hpp"
