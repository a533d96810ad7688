// The row kernel of losses without a teacher.
#include "rows.cuh"

namespace distill_kernels::cuda {

template void launch_rows<no_divergence>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);
template void launch_rows<student_entropy>(const Loss&, const Rows&, const RowLaunch&, const float*, void*);

}  // namespace distill_kernels::cuda
