# The target `gpu`: copies to and from GPUs, by nvcc or, from the same sources, on a GPU that is emulated.

set(gpu_sources cuda_copier.cpp cuda_layout.cpp cuda_ring.cpp copy_cuda.cu)

# Ampere, Hopper, Blackwell as machine code; PTX of the last for what comes after. Before the language is enabled, which
# would set it to the compiler's own default.
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90-real;100-real;100-virtual")
endif()

# AUTO says what it chose; a toolkit that does not work is an error only where it was asked for.
set(with_cuda ${LMCACHE_CUDA})
if(LMCACHE_SANITIZE)
  set(with_cuda EMULATED)
elseif(with_cuda STREQUAL "AUTO")
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
  endif()
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12)
    set(with_cuda ON)
  else()
    set(with_cuda OFF)
  endif()
  message(STATUS "LMCACHE_CUDA=AUTO: ${with_cuda}")
elseif(NOT with_cuda MATCHES "^(ON|OFF|EMULATED)$")
  message(FATAL_ERROR "LMCACHE_CUDA is ON, OFF, AUTO or EMULATED, not ${with_cuda}")
endif()

if(with_cuda STREQUAL "ON")
  enable_language(CUDA)
  find_package(CUDAToolkit 12 REQUIRED)
  set(CMAKE_CUDA_STANDARD 20)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
  add_library(gpu OBJECT ${gpu_sources})
  target_compile_options(gpu PRIVATE
    "$<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wconversion;-Wshadow;-Werror>"
    "$<$<COMPILE_LANGUAGE:CUDA>:-Werror;all-warnings;-Xcudafe;--display_error_number;-Xcompiler=-Wall,-Wextra,-Werror>")
  # Static, and it opens libcuda by itself when first called: the module imports where there is no driver.
  target_link_libraries(gpu PUBLIC engine CUDA::cudart_static)
elseif(with_cuda STREQUAL "EMULATED")
  add_library(gpu OBJECT ${gpu_sources} emulation/cuda_host.cpp emulation/cuda_streams.cpp)
  set_source_files_properties(copy_cuda.cu PROPERTIES LANGUAGE CXX
    COMPILE_OPTIONS "-x;c++;-Wno-unknown-pragmas;-fno-strict-aliasing")
  target_include_directories(gpu BEFORE PUBLIC emulation)
  target_compile_definitions(gpu PUBLIC LMCACHE_EMULATED_GPU=1)
  target_compile_options(gpu PRIVATE -Wall -Wextra -Wconversion -Wshadow -Werror)
  target_link_libraries(gpu PUBLIC engine)
endif()
