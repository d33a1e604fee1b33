# -Wno-restrict: g++ 12 reports std::string's operator+ (GCC bug 105651). -Wno-subobject-linkage: in a unity build g++
# takes a class's private implementation for a header's.
# kt_build_flags: the one INTERFACE target that carries language level, warnings and sanitizers.
add_library(kt_build_flags INTERFACE)
target_compile_features(kt_build_flags INTERFACE cxx_std_20)
target_include_directories(kt_build_flags INTERFACE "${PROJECT_SOURCE_DIR}")
target_compile_options(kt_build_flags INTERFACE
  -Wall -Wextra -Wpedantic -Wshadow -Wconversion -Wsign-conversion -Wold-style-cast
  -Wnon-virtual-dtor -Woverloaded-virtual -Wcast-align -Wundef -Wvla
  -fno-omit-frame-pointer
  $<$<BOOL:${KT_WERROR}>:-Werror>
  $<$<CXX_COMPILER_ID:GNU>:-Wduplicated-cond -Wlogical-op -Wno-psabi>
  $<$<AND:$<CXX_COMPILER_ID:GNU>,$<CONFIG:Release>>:-Wno-restrict>
  $<$<AND:$<CXX_COMPILER_ID:GNU>,$<BOOL:${CMAKE_UNITY_BUILD}>>:-Wno-subobject-linkage>)
if(KT_SANITIZE)
  target_compile_options(kt_build_flags INTERFACE -fsanitize=${KT_SANITIZE} -fno-sanitize-recover=all)
  target_link_options(kt_build_flags INTERFACE -fsanitize=${KT_SANITIZE})
endif()

# kt_add_library(<name> SOURCES ... [DEPS ...]): a static library on the project flags.
function(kt_add_library name)
  cmake_parse_arguments(ARG "" "" "SOURCES;DEPS" ${ARGN})
  add_library(${name} STATIC ${ARG_SOURCES})
  target_link_libraries(${name} PUBLIC ${ARG_DEPS} PRIVATE kt_build_flags)
  target_include_directories(${name} PUBLIC "${PROJECT_SOURCE_DIR}")
  set_target_properties(${name} PROPERTIES CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE ON)
endfunction()

# kt_add_isa_library(<isa> SOURCES ... FLAGS ...): object library kt_kernels_<isa>; the only
# place in the project where -m flags may appear.
function(kt_add_isa_library isa)
  cmake_parse_arguments(ARG "" "" "SOURCES;FLAGS" ${ARGN})
  add_library(kt_kernels_${isa} OBJECT ${ARG_SOURCES})
  target_link_libraries(kt_kernels_${isa} PRIVATE kt_build_flags)
  target_compile_options(kt_kernels_${isa} PRIVATE -O3 ${ARG_FLAGS})
  if(KT_SANITIZE)  # g++ 12 loses track of the unrolled blocks of vectors between the checks it adds.
    target_compile_options(kt_kernels_${isa} PRIVATE $<$<CXX_COMPILER_ID:GNU>:-Wno-array-bounds>)
  endif()
  set_target_properties(kt_kernels_${isa} PROPERTIES CXX_EXTENSIONS OFF POSITION_INDEPENDENT_CODE ON)
endfunction()

# kt_add_test(<name> SOURCES ... DEPS ... [LABELS ...] [FILTER <of GoogleTest>] [PREFIX <of the names>])
function(kt_add_test name)
  cmake_parse_arguments(ARG "" "FILTER;PREFIX" "SOURCES;DEPS;LABELS" ${ARGN})
  add_executable(${name} ${ARG_SOURCES})
  target_link_libraries(${name} PRIVATE ${ARG_DEPS} kt_build_flags GTest::gtest_main)
  gtest_discover_tests(${name} TEST_PREFIX "${ARG_PREFIX}" TEST_FILTER "${ARG_FILTER}" PROPERTIES LABELS "${ARG_LABELS}" TIMEOUT 60)
endfunction()
