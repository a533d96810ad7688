// The row kernel of the other divergences.
#include "rows.cuh"

namespace distill_kernels::cuda {

template void launch_rows<total_variation>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);
template void launch_rows<alpha_beta>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);
template void launch_rows<squared_hellinger>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);

}  // namespace distill_kernels::cuda
