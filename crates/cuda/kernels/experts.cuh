// What the kernels that take both products of the experts have in common.
#pragma once

#include "epilogue.cuh"

struct Part {
    Matrix matrix;
    Epilogue epilogue;
    const uint16_t* input;     // ordered: [n, cols], in the second product [slots, cols]; or stacked, a row per slot (see `activation_place`)
};
static_assert(sizeof(Part) == 128);
