package problem

// Exit statuses of `pergola run` and `submit --wait`.
const (
	ExitSucceeded      = 0
	ExitFailed         = 1
	ExitUsage          = 2
	ExitAborted        = 3
	ExitRejected       = 4
	ExitHubUnreachable = 5
)

// Meaning is what a code stands for elsewhere: the exit status of a command that ends with it and
// the HTTP status of an API call that does. Ends tells whether a job can end with it.
type Meaning struct {
	Exit int
	HTTP int
	Ends bool
}

// Codes has every code exactly once.
var Codes = map[Code]Meaning{
	Usage:          {ExitUsage, 400, false},
	NotFound:       {ExitFailed, 404, false},
	Exists:         {ExitFailed, 409, false},
	Denied:         {ExitFailed, 403, false},
	Expired:        {ExitFailed, 403, false},
	Superseded:     {ExitFailed, 403, false},
	HubUnreachable: {ExitHubUnreachable, 503, false},
	Unavailable:    {ExitHubUnreachable, 503, false},
	ProxyFailed:    {ExitHubUnreachable, 503, true},
	TLSIntercepted: {ExitHubUnreachable, 503, true},
	Version:        {ExitFailed, 400, false},

	AppInvalid:        {ExitUsage, 400, true},
	AppError:          {ExitFailed, 500, true},
	EnvBuildFailed:    {ExitFailed, 500, true},
	FlwrUnavailable:   {ExitFailed, 500, true},
	PythonUnsuitable:  {ExitFailed, 500, true},
	DependencyMissing: {ExitFailed, 500, true},
	StartTimeout:      {ExitFailed, 500, true},
	WaitTimeout:       {ExitFailed, 500, true},
	ProgramFailed:     {ExitFailed, 500, true},
	SiteLost:          {ExitFailed, 500, true},
	Removed:           {ExitFailed, 403, true},
	LinkLost:          {ExitFailed, 500, true},
	NoProgress:        {ExitFailed, 500, true},
	Deadline:          {ExitFailed, 500, true},
	AbortedByUser:     {ExitAborted, 500, true},
	PolicyDenied:      {ExitRejected, 403, true},
	HubRunnerDied:     {ExitFailed, 500, true},
	SiteRunnerDied:    {ExitFailed, 500, true},
	HubLost:           {ExitHubUnreachable, 503, true},
	OutOfMemory:       {ExitFailed, 500, true},
	DiskFull:          {ExitFailed, 507, true},
	NativeUnavailable: {ExitFailed, 500, true},
	BundleInvalid:     {ExitFailed, 400, true},
	Internal:          {ExitFailed, 500, true},
}

// Exit gives the exit status for err: 0 for nil.
func Exit(err error) int {
	if err == nil {
		return ExitSucceeded
	}
	return Codes[CodeOf(err)].Exit
}
