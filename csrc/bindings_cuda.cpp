// The Python face of copies to and from GPUs: part of lmcache.transfer._native; see _native.pyi for the contract.
#include <pybind11/pybind11.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cuda_copier.hpp"
#include "guard.hpp"

#ifdef LMCACHE_EMULATED_GPU
#include <cuda_runtime.h>
#endif

namespace py = pybind11;

namespace {

using u8 = std::uint8_t;
using u64 = std::uint64_t;
using lmcache::Direction;
using lmcache::cuda::CopierLimits;
using lmcache::cuda::DeviceCopier;

// Rows of 64-bit integers, copied.
template <class T>
std::vector<T> rows(const py::buffer& source, const char* name) {
    const py::buffer_info view = source.request();
    const bool words = view.itemsize == 8 && std::strchr("qQlLnN", view.format.back()) != nullptr;
    const auto bytes = static_cast<std::size_t>(view.size * view.itemsize);
    if (!words || bytes % sizeof(T) != 0 || PyBuffer_IsContiguous(view.view(), 'C') == 0) {
        throw py::value_error(std::string(name) + " must be contiguous 64-bit integers in rows of " +
                              std::to_string(sizeof(T) / 8));
    }
    std::vector<T> items(bytes / sizeof(T));
    if (bytes != 0) std::memcpy(items.data(), view.ptr, bytes);
    return items;
}

class Copier {
public:
    Copier(const py::buffer& pool, const py::buffer& planes, const py::buffer& groups, int device, u64 staging_bytes,
           unsigned plans_max, unsigned thread_blocks_max, u64 direct_bytes_max)
        : pool_(pool.request(true)) {
        std::vector<lmcache::Plane> plane_rows = rows<lmcache::Plane>(planes, "planes");
        std::vector<lmcache::Group> group_rows = rows<lmcache::Group>(groups, "groups");
        const py::gil_scoped_release unlocked;
        copier_ = std::make_unique<DeviceCopier>(
            std::move(plane_rows), std::move(group_rows), memory(), static_cast<u64>(pool_.size * pool_.itemsize),
            CopierLimits{device, staging_bytes, plans_max, thread_blocks_max, direct_bytes_max});
    }

    u64 extent_bytes() const { return copier_->extent_bytes(); }

    std::size_t chunks_max() const { return copier_->chunks_max(); }

    void register_range(u64 offset, u64 length) {
        const py::gil_scoped_release unlocked;
        copier_->register_range(offset, length);
    }

    u64 store(const py::buffer& blocks, const py::buffer& offsets, const py::buffer& seeds, u64 stream) {
        return submit(Direction::store, blocks, offsets, seeds, {}, stream);
    }

    u64 retrieve(const py::buffer& blocks, const py::buffer& offsets, const py::buffer& seeds,
                 const py::buffer& checksums, u64 stream) {
        return submit(Direction::retrieve, blocks, offsets, seeds, rows<u64>(checksums, "checksums"), stream);
    }

    py::object finish(u64 ticket) {
        std::optional<std::vector<u64>> sums;
        {
            const py::gil_scoped_release unlocked;
            sums = copier_->finish(ticket);
        }
        if (!sums) return py::none();
        demand_whole();
        return py::bytes(reinterpret_cast<const char*>(sums->data()), sums->size() * sizeof(u64));
    }

private:
    u8* memory() const { return static_cast<u8*>(pool_.ptr); }

    u64 submit(Direction direction, const py::buffer& blocks, const py::buffer& offsets, const py::buffer& seeds,
               std::vector<u64> checksums, u64 stream) {
        std::vector<std::int64_t> ids = rows<std::int64_t>(blocks, "blocks");
        std::vector<u64> places = rows<u64>(offsets, "offsets");
        std::vector<u64> starts = rows<u64>(seeds, "seeds");
        const py::gil_scoped_release unlocked;
        return copier_->submit(direction, std::move(ids), std::move(places), std::move(starts), std::move(checksums),
                               reinterpret_cast<void*>(stream));
    }

    // As in bindings.cpp: bytes of a page that is gone may not pass for a copy.
    void demand_whole() const {
        if (!lmcache::lost(memory())) return;
        errno = EFAULT;
        PyErr_SetFromErrno(PyExc_OSError);
        throw py::error_already_set();
    }

    py::buffer_info pool_;  // keeps the exporter from moving or freeing it
    std::unique_ptr<DeviceCopier> copier_;
};

#ifdef LMCACHE_EMULATED_GPU
void bind_emulation(py::module_& module) {
    py::module_ face = module.def_submodule("emulation", "The emulated GPU: streams, and what makes them go on.");
    face.def("make_stream", [] {
        cudaStream_t stream = nullptr;
        cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
        return reinterpret_cast<u64>(stream);
    });
    face.def("step", emulation::step);
    face.def("seed", emulation::seed, py::arg("value"));
}
#endif

}  // namespace

void bind_cuda(py::module_& module);

void bind_cuda(py::module_& module) {
    py::register_local_exception<lmcache::cuda::Busy>(module, "Busy", PyExc_RuntimeError);
    py::class_<Copier>(module, "DeviceCopier", py::module_local())
        .def(py::init<const py::buffer&, const py::buffer&, const py::buffer&, int, u64, unsigned, unsigned, u64>(),
             py::arg("pool"), py::arg("planes"), py::arg("groups"), py::arg("device"), py::arg("staging_bytes"),
             py::arg("plans_max"), py::arg("thread_blocks_max"),
             py::arg("direct_bytes_max") = lmcache::cuda::kDirectBytesMax)
        .def_property_readonly("extent_bytes", &Copier::extent_bytes)
        .def_property_readonly("chunks_max", &Copier::chunks_max)
        .def("register", &Copier::register_range, py::arg("offset"), py::arg("length"))
        .def("store", &Copier::store, py::arg("blocks"), py::arg("offsets"), py::arg("seeds"), py::arg("stream"))
        .def("retrieve", &Copier::retrieve, py::arg("blocks"), py::arg("offsets"), py::arg("seeds"),
             py::arg("checksums"), py::arg("stream"))
        .def("finish", &Copier::finish, py::arg("ticket"));
#ifdef LMCACHE_EMULATED_GPU
    bind_emulation(module);
#endif
}
