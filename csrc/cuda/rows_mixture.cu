// The row kernel of divergences from a mixture of both distributions.
#include "rows.cuh"

namespace distill_kernels::cuda {

template void launch_rows<jensen_shannon>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);
template void launch_rows<skew_forward_kl>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);
template void launch_rows<skew_reverse_kl>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);

}  // namespace distill_kernels::cuda
