#pragma once
// What each sub-command does. Each returns the process's exit status: 0, or 1 after an error line on stderr.

#include "server/cli/options.h"

namespace millrace::server {

int RunServe(const ServeOptions& options, const std::string& effective);
int RunGateway(const GatewayCommandOptions& options, const std::string& effective);
int RunWorker(const WorkerCommandOptions& options, const std::string& effective);
int RunChat(const ChatOptions& options);
int RunRole(const RoleOptions& options);
int RunInspect(const InspectOptions& options);
int RunDoctor(const DoctorOptions& options);
int RunTransferBench(const TransferBenchOptions& options);

}  // namespace millrace::server
