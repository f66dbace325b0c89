// Package nvflare reads the job folders of NVIDIA FLARE's Flower integration: meta.json, the configurations of server and
// clients, and the Flower app in custom/. It gives the app's directory, the settings of [tool.pergola] that say the same, and
// a warning for everything that Pergola does otherwise or not at all. [Fields] is the table of all that it knows.
//
// It runs nothing, knows no classes but those of the Flower integration, and refuses a job that is not a Flower job. It does
// not judge the settings' values beyond what a job folder may say: whoever reads [tool.pergola] does.
//
// Start with [Load]; [Job.Write] makes the equivalent app directory.
package nvflare
