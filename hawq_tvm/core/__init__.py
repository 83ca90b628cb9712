"""The ground floor: arithmetic, operators, stages, intervals, thresholds, errors; it imports nothing above itself."""
