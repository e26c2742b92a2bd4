// The device computes with the kernels of the CPU, but its memory is its own: the host cannot touch it, and a new buffer is full of
// NaN. It is as late as a device may be: graphs, and what is read and written in their order, wait until the host waits for them,
// while other accesses do not wait. Everything that crosses the bus is counted.

#include "test-device.h"

#include "ggml-backend-impl.h"
#include "ggml-cpp.h"
#include "ggml-cpu.h"
#include "ggml-impl.h"

#include "simt/simt-emulator.h"

#include "test-simt-ragged.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <set>
#include <string>
#include <vector>

static constexpr int N_DEVICES_MAX = 2;

static const char * const NAMES[N_DEVICES_MAX] = { "TEST0", "TEST1" };

static test_device_stats stats; // of all devices

static int64_t bytes_limit = 0; // for all buffers, 0 without

// how many to come until one fails, -1 without
static int64_t i_fail_buffer = -1;
static int64_t i_fail_graph  = -1;

static std::string get_kernel() {
    const char * name = getenv("TEST_DEVICE_KERNEL");
    for (const char * known : { "cpu", "cuda", "metal", "none" }) {
        if (strcmp(name ? name : "cpu", known) == 0) {
            return known;
        }
    }
    GGML_ABORT("TEST_DEVICE_KERNEL is %s, expected cpu, cuda, metal or none", name);
}

static const std::string kernel = get_kernel();

// in place of the CPU's kernel
static const std::optional<simt_device> emulated =
    kernel == "cuda" ? std::optional(simt_cuda()) : kernel == "metal" ? std::optional(simt_metal()) : std::nullopt;

//
// memory
//

static std::map<char *, size_t> pages; // of the buffers that exist
static std::recursive_mutex     pages_mutex;

// Linux on x86 has keys of pages that a thread turns in a register; elsewhere the pages are told, one buffer after the other
#ifdef PKEY_DISABLE_ACCESS
static const int pages_key = pkey_alloc(0, PKEY_DISABLE_ACCESS); // -1 if the CPU has none
#else
static const int pages_key = -1;
#endif

static void hide(void * data, size_t size) {
#ifdef PKEY_DISABLE_ACCESS
    if (pages_key >= 0) {
        GGML_ASSERT(pkey_mprotect(data, size, PROT_READ | PROT_WRITE, pages_key) == 0);
        return;
    }
#endif
    GGML_ASSERT(mprotect(data, size, PROT_NONE) == 0);
}

static void protect(bool hidden) {
#ifdef PKEY_DISABLE_ACCESS
    if (pages_key >= 0) {
        GGML_ASSERT(pkey_set(pages_key, hidden ? PKEY_DISABLE_ACCESS : 0) == 0);
        return;
    }
#endif
    for (const auto & [data, size] : pages) {
        GGML_ASSERT(mprotect(data, size, hidden ? PROT_NONE : PROT_READ | PROT_WRITE) == 0);
    }
}

// while one exists the device works, and its memory can be touched
class work {
public:
    work() : lock(pages_mutex) {
        if (depth++ == 0) {
            protect(/*hidden =*/ false);
        }
    }

    ~work() {
        if (--depth == 0) {
            protect(/*hidden =*/ true);
        }
    }

private:
    static int depth;

    std::lock_guard<std::recursive_mutex> lock;
};

int work::depth = 0;

static size_t page_align(size_t size) {
    const size_t n_page = sysconf(_SC_PAGESIZE);
    return GGML_PAD(std::max<size_t>(size, 1), n_page);
}

//
// work that the host has not waited for
//

struct pending_work {
    std::function<void()>     run;
    std::vector<const void *> data; // what it touches
};

static std::map<ggml_backend_t, std::vector<pending_work>> queues;

static std::set<ggml_backend_dev_t> ragged_devices; // that computed GGML_OP_FLASH_ATTN_RAGGED

// to wait is no part of this: whoever frees memory has to
static void check_unused(const char * base, size_t size) {
    for (const auto & [backend, queue] : queues) {
        for (const auto & item : queue) {
            for (const void * data : item.data) {
                if (data >= base && data < base + size) {
                    GGML_ABORT("a buffer of %zu bytes is freed that %s has not done with", size, ggml_backend_name(backend));
                }
            }
        }
    }
}

static void flush(ggml_backend_t backend) {
    work w;
    const std::vector<pending_work> queue = std::move(queues[backend]);
    queues.erase(backend);
    for (const auto & item : queue) {
        item.run();
    }
}

static void * buffer_get_base(ggml_backend_buffer_t buffer) {
    return buffer->context;
}

static void buffer_free(ggml_backend_buffer_t buffer) {
    std::lock_guard<std::recursive_mutex> lock(pages_mutex);
    check_unused((const char *) buffer->context, buffer->size);
    stats.bytes_live -= buffer->size;
    pages.erase((char *) buffer->context);
    munmap(buffer->context, page_align(buffer->size));
}

static void buffer_memset(ggml_backend_buffer_t, ggml_tensor * tensor, uint8_t value, size_t offset, size_t size) {
    work w;
    memset((char *) tensor->data + offset, value, size);
}

static void buffer_set(ggml_backend_buffer_t, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    work w;
    stats.n_set++;
    stats.bytes_set += size;
    memcpy((char *) tensor->data + offset, data, size);
}

static void buffer_get(ggml_backend_buffer_t, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    work w;
    stats.n_get++;
    stats.bytes_get += size;
    memcpy(data, (const char *) tensor->data + offset, size);
}

static bool buffer_copy(ggml_backend_buffer_t buffer, const ggml_tensor * src, ggml_tensor * dst) {
    const ggml_backend_buffer_t from = src->view_src ? src->view_src->buffer : src->buffer;
    if (from->buft != buffer->buft) {
        return false;
    }
    work w;
    memcpy(dst->data, src->data, ggml_nbytes(src));
    return true;
}

static void buffer_clear(ggml_backend_buffer_t buffer, uint8_t value) {
    work w;
    memset(buffer->context, value, buffer->size);
}

static const char * buft_get_name(ggml_backend_buffer_type_t buft) {
    return ggml_backend_dev_name(buft->device);
}

static ggml_backend_buffer_t buft_alloc(ggml_backend_buffer_type_t buft, size_t size) {
    std::lock_guard<std::recursive_mutex> lock(pages_mutex);

    if (i_fail_buffer >= 0 && i_fail_buffer-- == 0) {
        stats.n_failed++;
        return nullptr;
    }
    if (bytes_limit > 0 && stats.bytes_live + (int64_t) size > bytes_limit) {
        return nullptr;
    }

    void * data = mmap(nullptr, page_align(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
        return nullptr;
    }
    memset(data, 0xFF, size);
    hide(data, page_align(size));

    pages[(char *) data] = page_align(size);
    stats.bytes_live += size;
    stats.bytes_peak  = std::max(stats.bytes_peak, stats.bytes_live);

    ggml_backend_buffer_i iface = {};
    iface.free_buffer   = buffer_free;
    iface.get_base      = buffer_get_base;
    iface.memset_tensor = buffer_memset;
    iface.set_tensor    = buffer_set;
    iface.get_tensor    = buffer_get;
    iface.cpy_tensor    = buffer_copy;
    iface.clear         = buffer_clear;
    return ggml_backend_buffer_init(buft, iface, data, size);
}

static size_t buft_get_alignment(ggml_backend_buffer_type_t) {
    return 128;
}

static size_t buft_get_alloc_size(ggml_backend_buffer_type_t, const ggml_tensor * tensor) {
    const size_t  n_extra = tensor->op == GGML_OP_FLASH_ATTN_RAGGED && emulated ? emulated->extra(tensor) : 0;
    const int64_t n_row   = tensor->ne[0]%512;
    // as CUDA, which reads quantised rows up to a multiple of 512 elements (MATRIX_ROW_PADDING)
    return ggml_nbytes(tensor) + n_extra + (ggml_is_quantized(tensor->type) && n_row != 0 ? ggml_row_size(tensor->type, 512 - n_row) : 0);
}

//
// backend
//

// what a CUDA graph is made from
struct node_properties {
    ggml_tensor          node;
    std::vector<int64_t> src;

    bool operator==(const node_properties & other) const {
        return memcmp(&node, &other.node, sizeof(node)) == 0 && src == other.src;
    }
};

struct backend_context {
    ggml_backend_t cpu;

    std::map<const ggml_tensor *, std::vector<node_properties>> graphs; // by their first node
};

static bool is_new(backend_context & ctx, const ggml_cgraph * cgraph) {
    std::vector<node_properties> props;
    for (int i = 0; i < cgraph->n_nodes; ++i) {
        node_properties cur = { *cgraph->nodes[i], {} };
        for (const ggml_tensor * src : cgraph->nodes[i]->src) {
            if (src) {
                cur.src.push_back((intptr_t) src->data);
                cur.src.insert(cur.src.end(), src->ne, src->ne + GGML_MAX_DIMS);
                cur.src.insert(cur.src.end(), src->nb, src->nb + GGML_MAX_DIMS);
            }
        }
        props.push_back(std::move(cur));
    }

    auto & last = ctx.graphs[cgraph->nodes[0]];
    const bool res = last != props;
    last = std::move(props);
    return res;
}

static bool is_emulated(const ggml_tensor * op) {
    return emulated && (op->op == GGML_OP_FLASH_ATTN_RAGGED || op->op == GGML_OP_RAGGED_SELECT);
}

static void compute_emulated(ggml_tensor * op) {
    simt::machine machine(1);
    for (int i = 0; i < 5; ++i) {
        if (const ggml_tensor * src = op->src[i]) {
            machine.add(src->data, ggml_nbytes(src), src->name);
        }
    }
    machine.add(op->data, ggml_nbytes(op), "the result");
    if (const size_t n_extra = op->op == GGML_OP_FLASH_ATTN_RAGGED ? emulated->extra(op) : 0) {
        memset((char *) op->data + ggml_nbytes(op), 0xFF, n_extra);
        machine.add((char *) op->data + ggml_nbytes(op), n_extra, "the parts");
    }
    try {
        emulated->compute(machine, op);
    } catch (const simt::failure & e) {
        GGML_ABORT("%s: %s", op->name, e.what());
    }
}

// a graph that stands by itself: those that llama.cpp computes are built anew in the same memory
struct graph_copy {
    explicit graph_copy(const ggml_cgraph * cgraph);

    std::map<const ggml_tensor *, std::unique_ptr<ggml_tensor>> tensors;

    ggml_context_ptr ctx;
    ggml_cgraph    * gf;
};

graph_copy::graph_copy(const ggml_cgraph * cgraph) {
    for (int i = 0; i < cgraph->n_nodes; ++i) {
        tensors[cgraph->nodes[i]] = std::make_unique<ggml_tensor>(*cgraph->nodes[i]);
    }
    for (int i = 0; i < cgraph->n_nodes; ++i) {
        ggml_tensor & node = *tensors[cgraph->nodes[i]];
        for (auto & src : node.src) {
            if (src && !tensors.count(src)) {
                auto leaf = std::make_unique<ggml_tensor>(*src);
                leaf->op       = GGML_OP_NONE;
                leaf->view_src = nullptr;
                std::fill(leaf->src, leaf->src + GGML_MAX_SRC, nullptr);
                tensors[src] = std::move(leaf);
            }
            src = src ? tensors[src].get() : nullptr;
        }
        const auto it = tensors.find(node.view_src);
        node.view_src = it == tensors.end() ? nullptr : it->second.get();
    }

    const size_t size = 2*tensors.size() + 1;
    ctx.reset(ggml_init({ ggml_graph_overhead_custom(size, false), nullptr, true }));
    gf = ggml_new_graph_custom(ctx.get(), size, false);
    for (int i = 0; i < cgraph->n_nodes; ++i) {
        ggml_tensor * node = tensors[cgraph->nodes[i]].get();
        ggml_build_forward_expand(gf, node);
        node->flags = cgraph->nodes[i]->flags;
        GGML_ASSERT(gf->n_nodes == i + 1 && gf->nodes[i] == node);
    }
}

static void compute(ggml_backend_t cpu, ggml_cgraph * cgraph) {
    int i0 = 0;
    for (int i = 0; i <= cgraph->n_nodes; ++i) {
        if (i < cgraph->n_nodes && !is_emulated(cgraph->nodes[i])) {
            continue;
        }
        ggml_cgraph part = ggml_graph_view(cgraph, i0, i);
        if (part.n_nodes > 0) {
            GGML_ASSERT(ggml_backend_graph_compute(cpu, &part) == GGML_STATUS_SUCCESS);
        }
        if (i < cgraph->n_nodes) {
            compute_emulated(cgraph->nodes[i]);
        }
        i0 = i + 1;
    }
}

// whether all that stock's attention reads begins where a tensor may begin
static bool is_aligned(const ggml_tensor * node) {
    return node->op != GGML_OP_FLASH_ATTN_EXT || std::all_of(node->src, node->src + GGML_MAX_SRC, [](const ggml_tensor * src) {
        const ggml_backend_buffer_t buf = !src ? nullptr : src->view_src ? src->view_src->buffer : src->buffer;
        return !src || ((char *) src->data - (char *) ggml_backend_buffer_get_base(buf)) % buft_get_alignment(nullptr) == 0;
    });
}

static ggml_status backend_graph_compute(ggml_backend_t backend, ggml_cgraph * cgraph) {
    auto & ctx = *(backend_context *) backend->context;

    if (i_fail_graph >= 0 && i_fail_graph-- == 0) {
        return GGML_STATUS_FAILED;
    }

    if (!std::all_of(cgraph->nodes, cgraph->nodes + cgraph->n_nodes, is_aligned)) {
        return GGML_STATUS_FAILED;
    }

    stats.n_graphs++;
    stats.n_graphs_new += is_new(ctx, cgraph);

    const auto copy = std::make_shared<graph_copy>(cgraph);

    pending_work item = { [cpu = ctx.cpu, copy] { compute(cpu, copy->gf); }, {} };
    for (const auto & [_, tensor] : copy->tensors) {
        if (tensor->op == GGML_OP_FLASH_ATTN_RAGGED) {
            stats.n_ragged++;
            ragged_devices.insert(backend->device);
        }
        stats.n_select += tensor->op == GGML_OP_RAGGED_SELECT;
        item.data.push_back(tensor->data);
    }
    queues[backend].push_back(std::move(item));
    return GGML_STATUS_SUCCESS;
}

static void backend_set_async(ggml_backend_t backend, ggml_tensor * tensor, const void * data, size_t offset, size_t size) {
    stats.n_set++;
    stats.bytes_set += size;

    char * dst = (char *) tensor->data + offset;
    queues[backend].push_back({ [dst, data, size] { memcpy(dst, data, size); }, { dst } });
}

static void backend_get_async(ggml_backend_t backend, const ggml_tensor * tensor, void * data, size_t offset, size_t size) {
    stats.n_get++;
    stats.bytes_get += size;

    const char * src = (const char *) tensor->data + offset;
    memset(data, 0xFF, size);
    queues[backend].push_back({ [src, data, size] { memcpy(data, src, size); }, { src } });
}

static void backend_synchronize(ggml_backend_t backend) {
    stats.n_sync++;
    flush(backend);
}

static const char * backend_get_name(ggml_backend_t backend) {
    return ggml_backend_dev_name(backend->device);
}

static void backend_free(ggml_backend_t backend) {
    flush(backend);
    auto * ctx = (backend_context *) backend->context;
    ggml_backend_free(ctx->cpu);
    delete ctx;
    delete backend;
}

//
// device
//

static const char * dev_get_name       (ggml_backend_dev_t dev) { return (const char *) dev->context; }
static const char * dev_get_description(ggml_backend_dev_t)     { return "a device for tests, on the CPU"; }

static void dev_get_memory(ggml_backend_dev_t, size_t * free, size_t * total) {
    *total = size_t(64) << 30;
    *free  = *total - stats.bytes_live;
}

static enum ggml_backend_dev_type dev_get_type(ggml_backend_dev_t) {
    return GGML_BACKEND_DEVICE_TYPE_GPU;
}

static void dev_get_props(ggml_backend_dev_t dev, ggml_backend_dev_props * props) {
    *props = {};
    props->name        = dev_get_name(dev);
    props->description = dev_get_description(dev);
    props->type        = dev_get_type(dev);
    props->caps.async  = true;
    dev_get_memory(dev, &props->memory_free, &props->memory_total);
}

static ggml_backend_t dev_init(ggml_backend_dev_t dev, const char *) {
    static ggml_guid guid = { 0x77, 0x6b, 0x76, 0x2d, 0x74, 0x65, 0x73, 0x74, 0x2d, 0x64, 0x65, 0x76, 0x69, 0x63, 0x65, 0x30 };

    auto * ctx = new backend_context;
    ctx->cpu = ggml_backend_cpu_init();
    ggml_backend_cpu_set_n_threads(ctx->cpu, 1);

    ggml_backend_i iface = {};
    iface.get_name         = backend_get_name;
    iface.free             = backend_free;
    iface.set_tensor_async = backend_set_async;
    iface.get_tensor_async = backend_get_async;
    iface.synchronize      = backend_synchronize;
    iface.graph_compute    = backend_graph_compute;
    return new ggml_backend { &guid, iface, dev, ctx };
}

static ggml_backend_buffer_type_t dev_get_buffer_type(ggml_backend_dev_t dev) {
    static ggml_backend_buffer_type bufts[N_DEVICES_MAX];

    ggml_backend_buffer_type & res = bufts[dev->context == NAMES[1]];
    if (!res.device) {
        res.iface.get_name       = buft_get_name;
        res.iface.alloc_buffer   = buft_alloc;
        res.iface.get_alignment  = buft_get_alignment;
        res.iface.get_alloc_size = buft_get_alloc_size;
        res.device = dev;
    }
    return &res;
}

// an operation that the device computes without sinks only
static bool lacks_sinks(const ggml_tensor * op) {
    const char * name = getenv("TEST_DEVICE_NO_SINKS");
    return name && strcmp(name, ggml_op_name(op->op)) == 0 && op->src[4];
}

static bool dev_supports_op(ggml_backend_dev_t, const ggml_tensor * op) {
    const char * lacking = getenv("TEST_DEVICE_LACKS");
    if (lacks_sinks(op) || (lacking && strcmp(lacking, ggml_op_name(op->op)) == 0)) {
        return false;
    }
    if (op->op == GGML_OP_RAGGED_SELECT) {
        return emulated && emulated->supports(op);
    }
    if (op->op == GGML_OP_FLASH_ATTN_RAGGED && (kernel == "none" || (emulated && !emulated->supports(op)))) {
        return false;
    }
    return ggml_backend_dev_supports_op(ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU), op);
}

static bool dev_supports_buft(ggml_backend_dev_t dev, ggml_backend_buffer_type_t buft) {
    return buft == dev_get_buffer_type(dev);
}

//
// registry
//

static const char * reg_get_name(ggml_backend_reg_t) { return "TEST"; }

static size_t reg_get_device_count(ggml_backend_reg_t) {
    const char * n = getenv("TEST_DEVICE_COUNT");
    return n ? std::min(std::max(atoi(n), 1), N_DEVICES_MAX) : 1;
}

static ggml_backend_dev_t reg_get_device(ggml_backend_reg_t reg, size_t i) {
    static ggml_backend_device devs[N_DEVICES_MAX];

    ggml_backend_device & res = devs[i];
    if (!res.reg) {
        res.iface.get_name        = dev_get_name;
        res.iface.get_description = dev_get_description;
        res.iface.get_memory      = dev_get_memory;
        res.iface.get_type        = dev_get_type;
        res.iface.get_props       = dev_get_props;
        res.iface.init_backend    = dev_init;
        res.iface.get_buffer_type = dev_get_buffer_type;
        res.iface.supports_op     = dev_supports_op;
        res.iface.supports_buft   = dev_supports_buft;
        res.context = (void *) NAMES[i];
        res.reg     = reg;
    }
    return &res;
}

extern "C" ggml_backend_reg_t ggml_backend_init(void) {
    static ggml_backend_reg reg = [] {
        ggml_backend_reg res = {};
        res.api_version = GGML_BACKEND_API_VERSION;
        res.iface.get_name         = reg_get_name;
        res.iface.get_device_count = reg_get_device_count;
        res.iface.get_device       = reg_get_device;
        return res;
    }();
    return &reg;
}

//
// tests
//

void test_device_get_stats(test_device_stats * res) {
    *res = stats;
    res->n_devices = ragged_devices.size();
}

void test_device_set_limit(int64_t bytes) {
    bytes_limit = bytes;
}

void test_device_fail_buffer(int64_t i) {
    i_fail_buffer = i;
}

void test_device_fail_graph(int64_t i) {
    i_fail_graph = i;
}

void test_device_reset(void) {
    ragged_devices.clear();
    const int64_t bytes_live = stats.bytes_live;
    stats = {};
    stats.bytes_live = stats.bytes_peak = bytes_live;
}
