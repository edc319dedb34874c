/* The adder convolutions: float32 forward and backward, and sums of absolute differences of bytes. */
#include "adder_frame.c"
#include "adder_turn.c"
#include "adder_conv.c"
#include "adder_input_gradient.c"
#include "adder_conv_u8.c"
#include "adder_conv_steps.c"
