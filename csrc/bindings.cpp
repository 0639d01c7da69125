// The Python face: lmcache.transfer._native. The only file that knows Python; see _native.pyi for the contract.
#include <pybind11/pybind11.h>
#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "copy.hpp"
#include "guard.hpp"
#include "leaf.hpp"
#include "xxh3.hpp"

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14; headers of older systems do not know it
#endif

namespace py = pybind11;

#if LMCACHE_CUDA
void bind_cuda(py::module_& module);  // bindings_cuda.cpp
#endif

namespace {

using u8 = std::uint8_t;
using u64 = std::uint64_t;

[[noreturn]] void refuse(const std::string& sentence) { throw py::value_error(sentence); }

// A view of a caller's buffer that lives as long as this object: the exporter can neither move nor free it meanwhile.
class View {
public:
    View(const py::buffer& source, const char* name, bool writable = false) : name_(name) {
        const int flags = PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(source.ptr(), &view_, flags) != 0) {
            PyErr_Clear();
            refuse(name_ + (writable ? " must be a writable, contiguous buffer" : " must be a contiguous buffer"));
        }
    }
    ~View() { PyBuffer_Release(&view_); }
    View(const View&) = delete;
    View& operator=(const View&) = delete;

    u8* data() const { return static_cast<u8*>(view_.buf); }
    u64 bytes() const { return static_cast<u64>(view_.len); }

    // The buffer as rows of `T`, copied: raw bytes, or items of 64-bit integers.
    template <class T>
    std::vector<T> rows() const {
        if (!holds_words()) refuse(name_ + " must hold 64-bit integers in native byte order");
        if (bytes() % sizeof(T) != 0) {
            const std::string row_bytes = std::to_string(sizeof(T));
            refuse(name_ + " has " + std::to_string(bytes()) + " bytes, which is no multiple of " + row_bytes);
        }
        std::vector<T> items(bytes() / sizeof(T));
        if (!items.empty()) std::memcpy(items.data(), data(), bytes());
        return items;
    }

private:
    bool holds_words() const {
        std::string_view format = view_.format == nullptr ? "B" : view_.format;
        if (format.size() == 2 && (format[0] == '<' || format[0] == '=' || format[0] == '@')) format.remove_prefix(1);
        if (format.size() != 1) return false;
        const bool raw = view_.itemsize == 1 && std::string_view("Bbc").find(format[0]) != std::string_view::npos;
        const bool words = view_.itemsize == 8 && std::string_view("qQlLnN").find(format[0]) != std::string_view::npos;
        return raw || words;
    }

    std::string name_;
    Py_buffer view_{};
};

// A whole number of any Python integer type (also numpy's) as uint64.
u64 natural(const py::object& value, const char* name) {
    const py::object number = py::reinterpret_steal<py::object>(PyNumber_Index(value.ptr()));
    if (!number) throw py::error_already_set();
    const u64 result = PyLong_AsUnsignedLongLong(number.ptr());
    if (result == static_cast<u64>(-1) && PyErr_Occurred() != nullptr) {
        PyErr_Clear();
        refuse(std::string(name) + " must be between 0 and 2**64 - 1");
    }
    return result;
}

struct Tables {
    const py::buffer& planes;
    const py::buffer& groups;
    const py::buffer& blocks;
    const py::buffer& offsets;
    const py::buffer& seeds;
    const py::buffer* checksums;
    const py::object& threads;
};

lmcache::Plan plan_of(lmcache::Direction direction, const View& pool, const Tables& tables) {
    const u64 threads = natural(tables.threads, "threads");
    lmcache::Plan plan{};
    plan.direction = direction;
    plan.pool = pool.data();
    plan.pool_bytes = pool.bytes();
    plan.planes = View(tables.planes, "planes").rows<lmcache::Plane>();
    plan.groups = View(tables.groups, "groups").rows<lmcache::Group>();
    plan.blocks = View(tables.blocks, "blocks").rows<std::int64_t>();
    plan.offsets = View(tables.offsets, "offsets").rows<u64>();
    plan.seeds = View(tables.seeds, "seeds").rows<u64>();
    if (tables.checksums != nullptr) plan.checksums = View(*tables.checksums, "checksums").rows<u64>();
    plan.threads = threads > lmcache::kThreadsMax ? 0 : static_cast<unsigned>(threads);
    lmcache::check(plan);
    return plan;
}

// What is gone was read as zeros, or written where nobody else sees it: neither may pass for a copy.
void demand_whole(const u8* memory) {
    if (!lmcache::lost(memory)) return;
    errno = EFAULT;
    PyErr_SetFromErrno(PyExc_OSError);
    throw py::error_already_set();
}

std::vector<u64> run(const lmcache::Plan& plan) {
    std::vector<u64> sums;
    {
        const py::gil_scoped_release unlocked;
        sums = lmcache::copy(plan, lmcache::best_kernels());
    }
    demand_whole(plan.pool);
    return sums;
}

py::bytes store(const py::buffer& pool, const py::buffer& planes, const py::buffer& groups, const py::buffer& blocks,
                const py::buffer& offsets, const py::buffer& seeds,
                const py::object& threads) {
    const View memory(pool, "pool", true);
    const Tables tables{planes, groups, blocks, offsets, seeds, nullptr, threads};
    const std::vector<u64> sums = run(plan_of(lmcache::Direction::store, memory, tables));
    return py::bytes(reinterpret_cast<const char*>(sums.data()), sums.size() * sizeof(u64));
}

py::bytes retrieve(const py::buffer& pool, const py::buffer& planes, const py::buffer& groups, const py::buffer& blocks,
                   const py::buffer& offsets, const py::buffer& seeds,
                   const py::buffer& checksums, const py::object& threads) {
    const View memory(pool, "pool");
    const Tables tables{planes, groups, blocks, offsets, seeds, &checksums, threads};
    const lmcache::Plan plan = plan_of(lmcache::Direction::retrieve, memory, tables);
    const std::vector<u64> sums = run(plan);
    std::string verdicts(sums.size(), '\0');
    for (std::size_t i = 0; i < sums.size(); ++i) verdicts[i] = sums[i] == plan.checksums[i] ? '\1' : '\0';
    return py::bytes(verdicts);
}

u64 xxh3_64(const py::buffer& data, const py::object& seed) {
    const View view(data, "data");
    const u64 start = natural(seed, "seed");
    const py::gil_scoped_release unlocked;
    return lmcache::xxh3_64(lmcache::best_kernels(), view.data(), view.bytes(), start);
}

u64 checksum(const py::buffer& data, const py::object& seed) {
    const View view(data, "data");
    const u64 start = natural(seed, "seed");
    u64 sum = 0;
    {
        const py::gil_scoped_release unlocked;
        const lmcache::Kernels& kernels = lmcache::best_kernels();
        const std::vector<u64> leaves = lmcache::leaf_hashes(kernels, view.data(), view.bytes());
        sum = lmcache::checksum_of(kernels, leaves.data(), leaves.size(), start);
    }
    demand_whole(view.data());
    return sum;
}

int guard(const py::buffer& memory) {
    const View view(memory, "memory", true);
    return lmcache::guard(view.data(), view.bytes());
}

bool lost(const py::buffer& memory) { return lmcache::lost(View(memory, "memory").data()); }

py::bytes pack_tokens(const py::list& tokens) {
    const Py_ssize_t count = PyList_GET_SIZE(tokens.ptr());
    py::bytes packed = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, count * 4));
    if (!packed) throw py::error_already_set();
    char* out = PyBytes_AS_STRING(packed.ptr());
    for (Py_ssize_t i = 0; i < count; ++i) {
        // An item's __index__ could change the list: only true integers are taken, and those run no code of the caller.
        PyObject* item = PyList_GET_ITEM(tokens.ptr(), i);
        if (!PyLong_CheckExact(item)) throw py::type_error("a token id is an int");
        const unsigned long token = PyLong_AsUnsignedLong(item);
        if (token > 0xffffffffUL) {
            PyErr_Clear();
            PyErr_SetString(PyExc_OverflowError, "a token id is between 0 and 2**32 - 1");
            throw py::error_already_set();
        }
        const auto word = static_cast<std::uint32_t>(token);
        const unsigned char bytes[4] = {static_cast<unsigned char>(word), static_cast<unsigned char>(word >> 8),
                                        static_cast<unsigned char>(word >> 16), static_cast<unsigned char>(word >> 24)};
        std::memcpy(out + 4 * i, bytes, 4);
    }
    return packed;
}

void populate(const py::buffer& pool, const py::object& offset, const py::object& length) {
    const View view(pool, "pool", true);
    const u64 start = natural(offset, "offset");
    const u64 bytes = natural(length, "length");
    if (start > view.bytes() || bytes > view.bytes() - start) {
        refuse("a range of " + std::to_string(bytes) + " bytes at offset " + std::to_string(start) +
               " reaches outside the pool of " + std::to_string(view.bytes()) + " bytes");
    }
    int error = 0;
    {
        const py::gil_scoped_release unlocked;
        if (madvise(view.data() + start, bytes, MADV_POPULATE_WRITE) != 0) error = errno;
    }
    if (error != 0) {
        errno = error;
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
    }
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The copy engine: moves KV bytes between an engine's blocks and the pool, and proves them.";
    module.attr("HAS_CUDA") = static_cast<bool>(LMCACHE_CUDA);
    module.def("features", [] { return std::string(lmcache::best_kernels().name); });
    module.def("xxh3_64", xxh3_64, py::arg("data"), py::arg("seed") = 0);
    module.def("checksum", checksum, py::arg("data"), py::arg("seed"));
    module.def("store", store, py::arg("pool"), py::arg("planes"), py::arg("groups"), py::arg("blocks"),
               py::arg("offsets"), py::arg("seeds"), py::arg("threads"));
    module.def("retrieve", retrieve, py::arg("pool"), py::arg("planes"), py::arg("groups"), py::arg("blocks"),
               py::arg("offsets"), py::arg("seeds"), py::arg("checksums"), py::arg("threads"));
    module.def("pack_tokens", pack_tokens, py::arg("tokens"));
    module.def("guard", guard, py::arg("memory"));
    module.def("unguard", lmcache::unguard, py::arg("slot"));
    module.def("lost", lost, py::arg("memory"));
    module.def("populate", populate, py::arg("pool"), py::arg("offset"), py::arg("length"));
#if LMCACHE_CUDA
    bind_cuda(module);
#endif
}
