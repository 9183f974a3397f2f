#pragma once

namespace millrace::test {

// Two ranks in two processes that reach each other's windows through cudaIpc; the second one is killed.
// `program`: this executable, started again as the peer.
void TestProcesses(const char* program);
// The second process: its window's handle to `out_fd`, the first one's from `in_fd`, then steps until it is
// killed or alone. Returns the exit code.
int RunPeer(int in_fd, int out_fd);

}  // namespace millrace::test
