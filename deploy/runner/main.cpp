// hawq-run: one inference of a package, or its times, without Python and without TVM's compiler.

#include <tvm/ffi/container/array.h>
#include <tvm/ffi/container/map.h>
#include <tvm/ffi/extra/json.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <iostream>
#include <map>
#include <numeric>

#include "bench.hpp"
#include "error.hpp"
#include "host.hpp"
#include "machine.hpp"
#include "npy.hpp"
#include "package.hpp"

namespace {

using namespace hawq;
namespace ffi = tvm::ffi;
using ffi::Any, ffi::String;
using Object = ffi::json::Object;
using List = ffi::json::Array;

constexpr const char* kHelp =
    R"(usage: hawq-run PKG [--input [NAME=]X.npy]... [--output [NAME=]Y.npy]... [--bench] [options]

Runs a package of hawq-tvm, a folder or a single file, once, or times it.

  --input [NAME=]X.npy   an input; NAME where the package has several (default, with --bench only: random inputs)
  --output [NAME=]Y.npy  write an output
  --bench                time inferences
  --threads N            threads of the library (default: all processors of this process)
  --warmup-ms MS         unmeasured milliseconds before (default: 200)
  --duration SECONDS     measure at least so long (default: 3)
  --iterations N         and at least so often (default: 10)
  --json                 print JSON on standard output
  --help, --version

exit codes: 0 ok, 2 an option, an input array or an output path is wrong, 3 the package is not readable or not for this machine
)";

struct Options {
  std::string package;
  std::vector<std::string> inputs, outputs;
  bool bench = false, json = false;
  int threads = available_cores(), iterations = 10;
  double warmup_ms = 200, duration = 3;
};

double number(const std::string& option, const std::string& text, double least) {
  size_t end = 0;
  double value = -1;
  try {
    value = std::stod(text, &end);
  } catch (const std::exception&) {
    end = 0;
  }
  if (end == 0 || end != text.size() || !(value >= least) || value > 1e9) throw Error(kUsage, option + ": is no number of at least " + std::to_string(int(least)) + "; found " + text);
  return value;
}

int count(const std::string& option, const std::string& text) {
  const double value = number(option, text, 1);
  if (value != int(value) || value > 1e6) throw Error(kUsage, option + ": is no count; found " + text);
  return int(value);
}

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&]() -> std::string {
      if (i + 1 >= argc) throw Error(kUsage, word + ": needs a value; remedy: see hawq-run --help");
      return argv[++i];
    };
    if (word == "--input") options.inputs.push_back(value());
    else if (word == "--output") options.outputs.push_back(value());
    else if (word == "--bench") options.bench = true;
    else if (word == "--json") options.json = true;
    else if (word == "--threads") options.threads = count(word, value());
    else if (word == "--iterations") options.iterations = count(word, value());
    else if (word == "--warmup-ms") options.warmup_ms = number(word, value(), 0);
    else if (word == "--duration") options.duration = number(word, value(), 0);
    else if (word.rfind("--", 0) == 0) throw Error(kUsage, word + ": is no option; remedy: see hawq-run --help");
    else if (options.package.empty()) options.package = word;
    else throw Error(kUsage, word + ": is one argument too many; remedy: see hawq-run --help");
  }
  if (options.package.empty()) throw Error(kUsage, "a package is missing; remedy: see hawq-run --help");
  if (options.inputs.empty() && !options.bench) throw Error(kUsage, "an input is missing; expected --input X.npy, or --bench for random ones");
  return options;
}

// Files by the name of the input or output that each is for: "NAME=FILE", or FILE where there is one only.
std::map<std::string, std::string> by_name(const std::vector<std::string>& texts, const std::vector<Spec>& specs, const std::string& option) {
  std::string names;
  for (const Spec& spec : specs) names += (names.empty() ? "" : ", ") + spec.name;
  std::map<std::string, std::string> found;
  for (const std::string& text : texts) {
    const auto named = std::find_if(specs.begin(), specs.end(), [&](const Spec& s) { return text.rfind(s.name + "=", 0) == 0; });
    const bool is_path = specs.size() == 1 && (text.find('=') == std::string::npos || std::filesystem::exists(text));
    if (named == specs.end() && !is_path) throw Error(kUsage, option + ": names none of the package's; expected NAME=FILE with a name of " + names + "; found " + text);
    const Spec& spec = named == specs.end() ? specs.front() : *named;
    if (!found.emplace(spec.name, named == specs.end() ? text : text.substr(spec.name.size() + 1)).second) throw Error(kUsage, option + ": gives " + spec.name + " twice");
  }
  return found;
}

std::vector<std::string> input_arrays(const Options& options, const Package& package) {
  const auto paths = by_name(options.inputs, package.inputs, "--input");
  std::vector<std::string> arrays;
  for (const Spec& spec : package.inputs) {
    const auto path = paths.find(spec.name);
    if (path == paths.end() && !paths.empty()) throw Error(kUsage, "--input: " + spec.name + " is missing");
    arrays.push_back(path == paths.end() ? random_array(spec, arrays.size()) : read_array(path->second, spec));
  }
  return arrays;
}

// A number as JSON prints it in four decimals.
double rounded(double value) { return std::stod(std::to_string(value).substr(0, std::to_string(value).find('.') + 5)); }

Object bench(Machine& machine, const Options& options) {
  const std::vector<double> times = measure([&] { machine.run_to_the_end(); }, options.warmup_ms, options.duration, options.iterations);
  std::vector<double> sorted = times;
  std::sort(sorted.begin(), sorted.end());
  const double sum = std::accumulate(times.begin(), times.end(), 0.0);
  Object latency;
  latency.Set(String("min"), rounded(sorted.front()));
  latency.Set(String("median"), rounded(percentile(sorted, 50)));
  latency.Set(String("mean"), rounded(sum / double(times.size())));
  for (int p : {90, 95, 99}) latency.Set(String("p" + std::to_string(p)), rounded(percentile(sorted, p)));
  latency.Set(String("max"), rounded(sorted.back()));
  Object fields;
  fields.Set(String("threads"), int64_t(options.threads));
  fields.Set(String("warmup_ms"), options.warmup_ms);
  fields.Set(String("iterations"), int64_t(times.size()));
  fields.Set(String("latency_ms"), latency);
  fields.Set(String("throughput_per_s"), rounded(1000 * double(times.size()) / sum));
  return fields;
}

std::string shape_text(const Spec& spec) {
  std::string text;
  for (int64_t size : spec.shape) text += (text.empty() ? "" : "x") + std::to_string(size);
  return text;
}

int run(const Options& options) {
  const Package package = read_package(options.package);
  check_machine(package, options.package);
  const auto written = by_name(options.outputs, package.outputs, "--output");
  const std::vector<std::string> arrays = input_arrays(options, package);
  Machine machine(package, options.threads, options.package);
  machine.set_inputs(arrays);
  machine.run_to_the_end();
  Object fields;
  fields.Set(String("name"), String(package.name));
  List outputs;
  for (size_t i = 0; i < package.outputs.size(); ++i) {
    const Spec& spec = package.outputs[i];
    const auto path = written.find(spec.name);
    const std::string bytes = machine.output(i);
    if (path != written.end()) write_array(path->second, spec, bytes);
    Object output;
    output.Set(String("name"), String(spec.name));
    output.Set(String("dtype"), String(spec.dtype));
    List shape;
    for (int64_t size : spec.shape) shape.push_back(size);
    output.Set(String("shape"), shape);
    if (path != written.end()) output.Set(String("file"), String(path->second));
    outputs.push_back(output);
    if (!options.json) std::cout << spec.name << ": " << spec.dtype << " " << shape_text(spec) << (path != written.end() ? ", wrote " + path->second : "") << "\n";
  }
  fields.Set(String("outputs"), outputs);
  if (options.bench) {
    const Object times = bench(machine, options);
    for (const auto& [key, value] : times) fields.Set(key, value);
    if (!options.json) {
      const Object latency = times[String("latency_ms")].cast<Object>();
      std::cout << options.threads << " threads, " << times[String("iterations")].cast<int64_t>() << " inferences, milliseconds:";
      for (const char* key : {"min", "median", "mean", "p90", "p95", "p99", "max"}) std::cout << " " << key << " " << latency[String(key)].cast<double>();
      std::cout << "; " << times[String("throughput_per_s")].cast<double>() << " per second\n";
    }
  }
  if (options.json) std::cout << std::string(ffi::json::Stringify(fields, 2)) << "\n";
  return 0;
}

int fail(bool json, const std::string& sentence, int code) {
  std::string line = sentence;
  std::replace(line.begin(), line.end(), '\n', ' ');
  if (json) {
    Object fields;
    fields.Set(String("message"), String(line));
    fields.Set(String("exit_code"), int64_t(code));
    std::cout << std::string(ffi::json::Stringify(fields)) << "\n";
  }
  std::cerr << "hawq-run: " << line << "\n";
  return code;
}

}  // namespace

int main(int argc, char** argv) {
  const bool json = std::any_of(argv + 1, argv + argc, [](const char* word) { return std::strcmp(word, "--json") == 0; });
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--help") == 0) return std::cout << kHelp, 0;
    if (std::strcmp(argv[i], "--version") == 0) return std::cout << "hawq-run for package format " << HAWQ_FORMAT << ", tvm " HAWQ_TVM_VERSION ", tvm-ffi " HAWQ_TVM_FFI_VERSION "\n", 0;
  }
  try {
    return run(parse(argc, argv));
  } catch (const Error& e) {
    return fail(json, e.what(), e.code);
  } catch (const std::exception& e) {  // TVM's errors have a kind, a message and a backtrace: the message is enough
    const std::string text = e.what();
    return fail(json, "failed: " + text.substr(text.rfind("Error: ") == std::string::npos ? 0 : text.rfind("Error: ") + 7), kPackage);
  }
}
