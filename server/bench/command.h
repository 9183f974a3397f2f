#pragma once
// `millrace bench`: its flags and what it does.

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

namespace millrace::server {

struct BenchCommandOptions {
  std::string url = "http://127.0.0.1:8000";
  std::string model;
  std::string api_key;
  std::string metrics_url;
  std::string ca_file;
  bool insecure = false;
  std::string endpoint = "chat";
  bool no_stream = false;

  std::vector<double> rates;
  std::vector<int32_t> users;
  std::string trace;
  double trace_speed = 1;
  bool constant = false;
  double burstiness = 1;
  double ramp_to = 0;
  double ramp = 0;

  std::string input_tokens = "128";
  std::string output_tokens = "64";
  std::string turns = "1";
  double think = 0;
  int32_t prefix_pools = 0;
  int32_t prefix_tokens = 512;
  uint64_t seed = 1;

  int64_t requests = 0;
  double duration = 0;
  double warmup = 0;
  double grace = 30;
  double request_timeout = 600;
  int32_t connections_max = 0;
  int32_t repeat = 1;
  double temperature = 0;
  bool respect_eos = false;
  std::string body = "{}";

  std::string objectives;
  bool search = false;
  double goodput = 0.99;

  std::string json;
  std::string html;

  std::string compare_a, compare_b;  // bench compare
};

// Adds the sub-command; `options` must outlive parsing.
CLI::App* AddBench(CLI::App& app, BenchCommandOptions& options);

// The exit status: 0 when every request was served; 1 when one was not, after the results there are; 2 when
// there are none. `command_line` goes into the report.
int RunBench(const BenchCommandOptions& options, const CLI::App& command, const std::string& command_line);

}  // namespace millrace::server
