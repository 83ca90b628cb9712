#include "bench.hpp"

#include <chrono>
#include <cmath>

namespace hawq {

std::vector<double> measure(const std::function<void()>& call, double warmup_ms, double duration, int iterations) {
  using Clock = std::chrono::steady_clock;
  const auto after = [](double seconds) { return Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds)); };
  auto end = after(warmup_ms / 1000);
  do call();
  while (Clock::now() < end);
  std::vector<double> times;
  end = after(duration);
  while (times.size() < static_cast<size_t>(iterations) || Clock::now() < end) {
    const auto start = Clock::now();
    call();
    times.push_back(std::chrono::duration<double, std::milli>(Clock::now() - start).count());
  }
  return times;
}

double percentile(const std::vector<double>& sorted, double p) {
  const double place = p / 100 * double(sorted.size() - 1);
  const size_t below = static_cast<size_t>(std::floor(place));
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return sorted[below] + (place - double(below)) * (sorted[above] - sorted[below]);
}

}  // namespace hawq
