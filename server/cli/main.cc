#include "server/bench/command.h"
#include "server/cli/commands.h"

int main(int argc, char** argv) {
  using namespace millrace::server;
  CLI::App app("Millrace: a disaggregated inference server for the Ling Mixture-of-Experts models",
               "millrace");
  app.require_subcommand(1);
  app.set_version_flag("--version", MILLRACE_VERSION);
  app.footer(
      "'millrace COMMAND --help' explains a command. Start with: millrace serve --model "
      "deploy/models/ling-tiny");

  AddConfigFile(app);
  ServeOptions serve;
  GatewayCommandOptions gateway;
  WorkerCommandOptions worker;
  ChatOptions chat;
  RoleOptions role;
  InspectOptions inspect;
  DoctorOptions doctor;
  TransferBenchOptions transfer_bench;
  BenchCommandOptions bench;
  CLI::App* const serve_command = AddServe(app, serve);
  CLI::App* const gateway_command = AddGateway(app, gateway);
  CLI::App* const worker_command = AddWorker(app, worker);
  CLI::App* const chat_command = AddChat(app, chat);
  CLI::App* const role_command = AddRole(app, role);
  CLI::App* const inspect_command = AddInspect(app, inspect);
  CLI::App* const doctor_command = AddDoctor(app, doctor);
  CLI::App* const transfer_bench_command = AddTransferBench(app, transfer_bench);
  CLI::App* const bench_command = AddBench(app, bench);
  CLI11_PARSE(app, argc, argv);

  if (serve_command->parsed()) return RunServe(serve, EffectiveConfiguration(*serve_command));
  if (gateway_command->parsed()) return RunGateway(gateway, EffectiveConfiguration(*gateway_command));
  if (worker_command->parsed()) return RunWorker(worker, EffectiveConfiguration(*worker_command));
  if (chat_command->parsed()) return RunChat(chat);
  if (role_command->parsed()) return RunRole(role);
  if (inspect_command->parsed()) return RunInspect(inspect);
  if (doctor_command->parsed()) return RunDoctor(doctor);
  if (transfer_bench_command->parsed()) return RunTransferBench(transfer_bench);
  if (bench_command->parsed()) {
    std::string command_line = "millrace";
    for (int i = 1; i < argc; ++i) {
      const bool secret = std::string_view(argv[i - 1]) == "--api-key";  // the report is for others to read
      command_line += std::string(" ") + (secret ? "***" : argv[i]);
    }
    return RunBench(bench, *bench_command, command_line);
  }
  return 1;
}
