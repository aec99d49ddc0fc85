# Finds the torch of the Python that builds, by asking it: torch::torch, TORCH_VERSION and
# TORCH_CUDA_VERSION, which is empty for a CPU build. find_package(Torch) is not used because it
# fails where torch is built for CUDA and the machine has no CUDA compiler: the CPU kernels can
# still be built there.

set(_ask "
import torch
from torch.utils.cpp_extension import include_paths, library_paths
print(torch.__version__)
print(torch.version.cuda or '')
print(int(torch._C._GLIBCXX_USE_CXX11_ABI))
print(';'.join(include_paths()))
print(library_paths()[0])
")
execute_process(COMMAND "${Python_EXECUTABLE}" -c "${_ask}"
  OUTPUT_VARIABLE _answer ERROR_VARIABLE _error RESULT_VARIABLE _failed)
if(_failed)
  message(FATAL_ERROR "anyflow: ${Python_EXECUTABLE} cannot import torch; install it first, then "
    "build with `pip install -e . --no-build-isolation`.\n${_error}")
endif()
# A list per line would lose the empty ones.
string(REGEX MATCH "([^\n]*)\n([^\n]*)\n([01])\n([^\n]*)\n([^\n]*)\n$" _matched "${_answer}")
set(TORCH_VERSION "${CMAKE_MATCH_1}")
set(TORCH_CUDA_VERSION "${CMAKE_MATCH_2}")
set(_abi "${CMAKE_MATCH_3}")
set(_includes "${CMAKE_MATCH_4}")
set(_libraries "${CMAKE_MATCH_5}")
message(STATUS "torch ${TORCH_VERSION} in ${_libraries}, CUDA: ${TORCH_CUDA_VERSION}")

add_library(torch::torch INTERFACE IMPORTED)
# Imported, so that they are system headers without warnings.
target_include_directories(torch::torch INTERFACE ${_includes})
target_compile_definitions(torch::torch INTERFACE _GLIBCXX_USE_CXX11_ABI=${_abi})
foreach(_name c10 torch_cpu torch)
  find_library(TORCH_LIBRARY_${_name} ${_name}
    PATHS "${_libraries}" NO_DEFAULT_PATH NO_CACHE REQUIRED)
  target_link_libraries(torch::torch INTERFACE "${TORCH_LIBRARY_${_name}}")
endforeach()
# Libraries are found through the torch that Python has loaded; no path of the build machine goes
# into the module.
set(CMAKE_SKIP_RPATH ON)

# What CUDA code needs besides; an empty target for a CPU build.
add_library(torch::cuda INTERFACE IMPORTED)
if(TORCH_CUDA_VERSION)
  foreach(_name c10_cuda torch_cuda)
    find_library(TORCH_LIBRARY_${_name} ${_name}
      PATHS "${_libraries}" NO_DEFAULT_PATH NO_CACHE REQUIRED)
    target_link_libraries(torch::cuda INTERFACE "${TORCH_LIBRARY_${_name}}")
  endforeach()
endif()
