// native/simt/simt-metal.h for the emulator: what the .metal file uses of the language, and its kernels under their names

#pragma once

#include "ggml-metal-device.h"
#include "simt-primitives.h"

#include <tuple>
#include <utility>

#define kernel static
#define device
#define constant const

// words of the language that are no names
#define thread      simt_a_word_of_the_language !
#define threadgroup simt_a_word_of_the_language !
#define vertex      simt_a_word_of_the_language !
#define fragment    simt_a_word_of_the_language !

typedef uint16_t ushort;

struct uint3 {
    uint32_t x, y, z;
};

// an argument: a pointer into a buffer, or a reference to bytes
template <typename T>
struct simt_argument {
    static T get(void * p) { return (T) p; }
};

template <typename T>
struct simt_argument<T &> {
    static T & get(void * p) { return *(T *) p; }
};

// the last four parameters of a kernel say where it runs: group of the grid, thread of the group, SIMD group, lane
template <typename... params_t, size_t... is>
static void simt_call(void (*fn)(params_t...), const simt_slots & slots, std::index_sequence<is...>) {
    typedef std::tuple<simt_argument<params_t>...> arguments;

    const simt_ids id = simt_get_ids();
    fn(std::tuple_element_t<is, arguments>::get(slots.at(is))...,
        uint3{ (uint32_t) id.block, 0, 0 }, (ushort) id.tid, (ushort) id.warp, (ushort) id.lane);
}

template <typename... params_t>
static bool simt_add(const char * name, void (*fn)(params_t...)) {
    ggml_metal_library::kernels()[name] = [fn](const simt_slots & slots) {
        simt_call(fn, slots, std::make_index_sequence<sizeof...(params_t) - 4>());
    };
    return true;
}

#define SIMT_FUNCTION_CONSTANT(T, name, index) static const T & name = ggml_metal_library::constants().at(index);

#define SIMT_CONCAT_(a, b) a##b
#define SIMT_CONCAT(a, b)  SIMT_CONCAT_(a, b)

#define SIMT_KERNEL_NAME(name, ...) static const bool SIMT_CONCAT(simt_added_, name) = simt_add(#name, __VA_ARGS__);
