# Decides whether the CUDA kernels are built and for which architectures:
# ANYFLOW_HAS_CUDA, ANYFLOW_CUDA_BUILT_ARCHS and ANYFLOW_CUDA_NOTE, one line that says why.

set(ANYFLOW_HAS_CUDA OFF)
set(ANYFLOW_CUDA_BUILT_ARCHS "")
if(NOT ANYFLOW_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "anyflow: ANYFLOW_CUDA must be AUTO, ON or OFF, not '${ANYFLOW_CUDA}'")
endif()

# Checked whether or not the kernels are built: a typing error should not wait for another machine.
foreach(_arch ${ANYFLOW_CUDA_ARCHS})
  if(NOT _arch MATCHES "^[0-9]+[af]?$")
    message(FATAL_ERROR "anyflow: ANYFLOW_CUDA_ARCHS: '${_arch}' is no CUDA architecture; expected "
      "a list such as \"80;90a;100a\" of compute capabilities without the dot")
  endif()
endforeach()

find_program(ANYFLOW_NVCC nvcc
  HINTS "$ENV{CUDACXX}" ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(EXISTS "$ENV{CUDACXX}")
  set(ANYFLOW_NVCC "$ENV{CUDACXX}")
endif()
if(ANYFLOW_CUDA STREQUAL "OFF")
  set(ANYFLOW_CUDA_NOTE "left out: ANYFLOW_CUDA is OFF")
elseif(NOT TORCH_CUDA_VERSION)
  set(ANYFLOW_CUDA_NOTE "left out: torch ${TORCH_VERSION} is built without CUDA")
elseif(NOT ANYFLOW_NVCC)
  set(ANYFLOW_CUDA_NOTE "left out: no CUDA compiler (nvcc) in CUDACXX, CUDA_HOME or PATH")
else()
  set(ANYFLOW_HAS_CUDA ON)
endif()
if(NOT ANYFLOW_HAS_CUDA)
  if(ANYFLOW_CUDA STREQUAL "ON")
    message(FATAL_ERROR
      "anyflow: ANYFLOW_CUDA is ON, but the CUDA kernels would be ${ANYFLOW_CUDA_NOTE}")
  endif()
  message(STATUS "anyflow: CUDA kernels ${ANYFLOW_CUDA_NOTE}")
  return()
endif()

# What this nvcc can generate, as "75;80;90;100;...", without the variants 90a and 100f.
execute_process(COMMAND "${ANYFLOW_NVCC}" --list-gpu-code
  OUTPUT_VARIABLE _known RESULT_VARIABLE _failed)
if(_failed)
  message(FATAL_ERROR "anyflow: `${ANYFLOW_NVCC} --list-gpu-code` failed; is it a CUDA compiler?")
endif()
string(REGEX MATCHALL "[0-9]+" _known "${_known}")
set(_archs ${ANYFLOW_CUDA_ARCHS})
if(NOT _archs)
  foreach(_arch 80 90a 100a)
    string(REGEX REPLACE "[af]$" "" _number ${_arch})
    if(_number IN_LIST _known) # an older CUDA does not know all of them
      list(APPEND _archs ${_arch})
    endif()
  endforeach()
endif()
foreach(_arch ${_archs})
  string(REGEX REPLACE "[af]$" "" _number ${_arch})
  if(NOT _number IN_LIST _known)
    list(JOIN _known " " _known)
    message(FATAL_ERROR "anyflow: ANYFLOW_CUDA_ARCHS: ${ANYFLOW_NVCC} does not know '${_arch}'; "
      "it knows ${_known}")
  endif()
endforeach()

# Machine code for each, and PTX of the newest for the GPUs after it. Code for 90a runs on 9.0
# alone, so the PTX is that of 90.
set(CMAKE_CUDA_COMPILER "${ANYFLOW_NVCC}")
set(_newest 0)
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(_arch ${_archs})
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${_arch}-real)
  string(REGEX REPLACE "[af]$" "" _number ${_arch})
  if(_number GREATER _newest)
    set(_newest ${_number})
  endif()
endforeach()
list(APPEND CMAKE_CUDA_ARCHITECTURES ${_newest}-virtual)
set(CMAKE_CUDA_STANDARD 17)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
target_link_libraries(torch::cuda INTERFACE CUDA::cudart)
list(JOIN _archs "," ANYFLOW_CUDA_BUILT_ARCHS)
string(APPEND ANYFLOW_CUDA_BUILT_ARCHS ",${_newest}+PTX")
set(ANYFLOW_CUDA_NOTE
  "built with CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${ANYFLOW_CUDA_BUILT_ARCHS}")
message(STATUS "anyflow: CUDA kernels ${ANYFLOW_CUDA_NOTE}")
