// Times of single inferences, by the method of hawq_tvm/bench/measure.py.
#pragma once

#include <functional>
#include <vector>

namespace hawq {

// Milliseconds of calls: at least `warmup_ms` unmeasured, then at least `iterations` and `duration` seconds.
std::vector<double> measure(const std::function<void()>& call, double warmup_ms, double duration, int iterations);

// The percentile p of sorted values, interpolated as numpy.percentile does.
double percentile(const std::vector<double>& sorted, double p);

}  // namespace hawq
