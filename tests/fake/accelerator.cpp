// A CPU build of torch has no accelerator. This definition comes before torch's own when this library is
// loaded first, and makes "cuda" the accelerator whose streams autograd asks for.

#include <c10/core/DeviceType.h>

#include <optional>

namespace at::accelerator {

__attribute__((visibility("default"))) std::optional<c10::DeviceType> getAccelerator(bool /*checked*/) {
  return c10::DeviceType::CUDA;
}

} // namespace at::accelerator
