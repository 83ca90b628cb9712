"""What every frontend shares: values, the node being imported, and builders of float operators that no dialect owns."""
