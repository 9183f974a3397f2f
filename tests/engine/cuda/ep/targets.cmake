# cuda_ep_test and ep_bench: need the CUDA toolkit alone. Without a GPU they exit with 77, which ctest shows as skipped.
set(ep ${CMAKE_CURRENT_LIST_DIR})
add_executable(cuda_ep_test ${ep}/ep_test.cc ${ep}/ep_layer.cc ${ep}/process_test.cc)
target_link_libraries(cuda_ep_test PRIVATE millrace_cuda_device)
add_executable(ep_bench ${ep}/ep_bench.cc)
target_link_libraries(ep_bench PRIVATE millrace_cuda_device)
add_test(NAME cuda_ep_test COMMAND cuda_ep_test)
add_test(NAME cuda_ep_processes COMMAND cuda_ep_test processes)
set_tests_properties(cuda_ep_test cuda_ep_processes PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 300)
