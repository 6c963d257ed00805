"""A static model of Hopper kernels: compile, read the machine code, predict. No measurement: see README.md."""
