// The parameters of products that run on every generation.
#pragma once

#include "epilogue.cuh"

struct Product {
    Matrix matrix;
    const void* input;         // [n, cols] 16-bit
    const uint32_t* list;      // experts: see `Routes`; gemm_many.cu, dense: null
    Epilogue epilogue;
    uint32_t n;                // tokens
    uint32_t experts, experts_per_token;
    uint32_t padding;
};
static_assert(sizeof(Product) == sizeof(Matrix) + sizeof(Epilogue) + 32);
