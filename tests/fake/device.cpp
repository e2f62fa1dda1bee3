// What a CPU build of torch lacks to run code on tensors whose device is "cuda:0": a guard that switches
// devices and streams (autograd asks for one before every operation), hooks that say that a device is there,
// and the choice of an attention kernel. Nothing here computes: the tensors' values are on the CPU.

#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/DispatchStub.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

const c10::Device ONLY_DEVICE(c10::DeviceType::CUDA, 0);

c10::Stream only_stream() {
  return c10::Stream(c10::Stream::DEFAULT, ONLY_DEVICE);
}

// One device with one stream, on which all work is done at once.
struct OneDevice final : public c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;

  OneDevice() = default;
  explicit OneDevice(c10::DeviceType /*type*/) {}

  c10::DeviceType type() const override {
    return static_type;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1;
  }

  c10::Device getDevice() const override {
    return ONLY_DEVICE;
  }
  c10::Device exchangeDevice(c10::Device /*next*/) const override {
    return ONLY_DEVICE;
  }
  void setDevice(c10::Device /*next*/) const override {}
  void uncheckedSetDevice(c10::Device /*next*/) const noexcept override {}

  c10::Stream getStream(c10::Device /*of*/) const override {
    return only_stream();
  }
  c10::Stream getNewStream(c10::Device /*of*/, int /*priority*/) const override {
    return only_stream();
  }
  c10::Stream exchangeStream(c10::Stream /*next*/) const override {
    return only_stream();
  }
  bool queryStream(const c10::Stream& /*stream*/) const override {
    return true;
  }
  void synchronizeStream(const c10::Stream& /*stream*/) const override {}

  // events are over as soon as they are recorded
  void record(void** /*event*/, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void* /*event*/, const c10::Stream&) const override {}
  bool queryEvent(void* /*event*/) const override {
    return true;
  }
  void destroyEvent(void* /*event*/, const c10::DeviceIndex) const noexcept override {}
};

// The registry of guards is a table of pointers, which is read without a lock.
const OneDevice one_device;
const c10::impl::DeviceGuardImplRegistrar registered(c10::DeviceType::CUDA, &one_device);

} // namespace

namespace at {
namespace {

struct OneDeviceHooks final : public CUDAHooksInterface {
  explicit OneDeviceHooks(CUDAHooksArgs /*none*/) {}

  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isBuilt() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(DeviceIndex /*device*/) const override {
    return true;
  }
  DeviceIndex deviceCount() const override {
    return 1;
  }
  int getNumGPUs() const override {
    return 1;
  }
  DeviceIndex current_device() const override {
    return 0;
  }
  DeviceIndex getCurrentDevice() const override {
    return 0;
  }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, OneDeviceHooks)

} // namespace

namespace native {

// As a GPU of today chooses: the flash kernel for half types without a mask, else the efficient one.
int64_t choose_attention(
    const Tensor& query,
    const Tensor& /*key*/,
    const Tensor& /*value*/,
    const std::optional<Tensor>& mask,
    double /*dropout*/,
    bool /*causal*/,
    std::optional<double> /*scale*/,
    bool /*grouped*/) {
  const bool half = query.scalar_type() == kBFloat16 || query.scalar_type() == kHalf;
  const auto chosen = half && !mask ? sdp::SDPBackend::flash_attention : sdp::SDPBackend::efficient_attention;
  return static_cast<int64_t>(chosen);
}

REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &choose_attention)

} // namespace native
} // namespace at
