"""What runs a library on a machine without our compiler: TVM's virtual machine, the CUDA driver, refusals."""
